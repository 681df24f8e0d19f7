"""The comparison: catalogue of methods, worlds, rows, figures, report. A leaf: nothing in the core imports it."""
