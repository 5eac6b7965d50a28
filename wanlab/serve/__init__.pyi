from .jobs import Job as Job
from .jobs import JobStore as JobStore
from .ray_app import Served as Served
from .ray_app import served as served
from .settings import ServiceSettings as ServiceSettings
