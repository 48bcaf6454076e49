"""A simulated device: any order of work that streams and events allow, chosen by a seed, with a race checker."""

from gapless.device.sim.device import SimDevice
from gapless.device.sim.order import Order, RandomOrder, TimedOrder
from gapless.device.sim.races import Race, RaceChecker, Use
from gapless.device.sim.timeline import Timeline
from gapless.spans import Span

__all__ = ["Order", "Race", "RaceChecker", "RandomOrder", "SimDevice", "Span", "TimedOrder", "Timeline", "Use"]
