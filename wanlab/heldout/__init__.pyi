from .cases import Case as Case
from .cases import draw_cases as draw_cases
from .cases import example_case as example_case
from .cases import inputs as inputs
from .cases import load_cases as load_cases
from .cases import requests as requests
from .clips import FRAMES as FRAMES
