from .mlflow_runs import Exported as Exported
from .mlflow_runs import to_mlflow as to_mlflow
from .table import flat as flat
from .table import to_csv as to_csv
from .table import to_parquet as to_parquet
