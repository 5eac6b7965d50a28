from .jobs import Job as Job
from .jobs import JobStore as JobStore
from .running import Served as Served
from .running import served as served
from .settings import ServiceSettings as ServiceSettings
