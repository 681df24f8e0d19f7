from .curves import draw_curves as draw_curves
from .figures import FIGURES as FIGURES
from .figures import draw as draw
from .html import html_report as html_report
from .html import number as number
from .html import plain_table as plain_table
from .scatter import scatter as scatter
