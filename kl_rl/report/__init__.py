"""What people see: figures and pages from rows. matplotlib lives here."""
