"""Writers that show a run's curves elsewhere: hand their `see` to `train` or `simulate` as `on_record`."""

from decentral.watching.tensorboard import TensorBoardWriter
from decentral.watching.wandb import WandbWriter

__all__ = ["TensorBoardWriter", "WandbWriter"]
