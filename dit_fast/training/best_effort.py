"""What a run does besides training and saving: whatever fails there is one warning and costs nothing else."""

import logging
from collections.abc import Callable

from dit_fast.errors import RankError
from dit_fast.training.world import is_lost_connection

logger = logging.getLogger(__name__)


class BestEffort:
    """Calls what is printed, logged, drawn and scored. `failed`: what has failed so far, by name."""

    def __init__(self) -> None:
        self.failed: set[str] = set()

    def __call__(self, name: str, action: Callable[[], object]) -> bool:
        """Call `action`; where it raises, warn of `name`, the first time, and return False.

        A lost rank is raised, as it was: that is a matter of the training.
        """
        try:
            action()
        except Exception as error:
            lost = isinstance(error, RuntimeError) and is_lost_connection(error)
            if lost or isinstance(error, RankError):
                raise
            if name not in self.failed:
                self.failed.add(name)
                reason = " ".join(str(error).split()) or type(error).__name__
                logger.warning(
                    "%s; training continues without it", reason if name in reason else f"{name}: {reason}"
                )
            return False
        return True
