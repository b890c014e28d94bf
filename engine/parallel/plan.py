"""A mesh on paper: what each of its ranks will hold, how long a step will take, before anything is started.

Sizes come from the functions that the engine itself lays weights out with (`shards.py`, `kernels/weight.py`) and
pipelines from the lists that it executes (`schedule.py`), so a plan and the ranks it describes cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import msgspec

from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.errors import ConfigError, nearest
from engine.parallel import footprint
from engine.parallel.collectives import Group
from engine.parallel.cost import Costing, StepTime, Traffic, costing, step_time, step_traffic
from engine.parallel.footprint import DTYPES
from engine.parallel.machine import Machine
from engine.parallel.mesh import AXES, Mesh
from engine.parallel.schedule import bubble_fraction, peak_activations, schedule
from engine.parallel.shards import Placement
