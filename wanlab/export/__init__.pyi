from .components import ClipShape as ClipShape
from .components import random_feeds as random_feeds
from .export import ExportReport as ExportReport
from .export import axes_table as axes_table
from .export import export as export
from .export import export_all as export_all
from .export import report_frame as report_frame
from .vae_streamed import export_streamed as export_streamed
