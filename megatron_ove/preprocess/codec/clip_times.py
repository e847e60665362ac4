"""When the frames of a clip are shown, and which of them the places of an even time grid take.

Time stamps are taken as players take them: what is missing, stands still, runs backwards or jumps is replaced by the
clip's usual step, so that a clock that starts anew in a joined recording, or no clock at all, still gives an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timeline:
    """The frames of a clip in the order in which they are shown; times are in ticks of the stream's clock.

    Attributes:
        ticks: when each frame is shown, None where the file does not say.
        last_duration: how long the last frame is shown, 0 if the file does not say.
        longest_step: a longer time between two frames is an error of the clock.
    """

    ticks: Sequence[int | None]
    last_duration: int
    longest_step: float

    def grid(self, num_places: int) -> np.ndarray:
        """Returns which frame is seen at each of `num_places` evenly spaced times, [num_places] int32, ascending.

        The first place takes the first frame and the last place the last one. At a constant rate these are evenly
        spaced frame numbers. Otherwise a place takes the frame on the screen at its time, or the one after it if that
        comes within half a usual step, so that both rules agree.
        """
        num_frames = len(self.ticks)
        numbers = np.round(np.linspace(0, num_frames - 1, num_places)).astype(np.int32)
        steps = self._steps()
        if steps is None:
            return numbers
        times = np.concatenate([[0.0], np.cumsum(steps)])
        usual = float(np.median(steps))
        # The last frame takes places of its own only if it stands: small errors of its duration must change nothing.
        still = min(float(self.last_duration), self.longest_step) - usual
        if still <= max(1.5 * usual, times[-1] / max(num_places - 1, 1)):
            still = 0.0
            even = np.linspace(0, times[-1], num_frames)
            if np.abs(times - even).max() <= even[1] / 2:  # a constant rate, its time stamps rounded
                return numbers
        change = times[1:] - np.minimum(steps, usual) / 2
        return np.searchsorted(change, np.linspace(0, times[-1] + still, num_places), side="right").astype(np.int32)

    def _steps(self) -> np.ndarray | None:
        """Returns the times between frames, [n - 1] float64 above 0; None if no two time stamps can be used."""
        known = np.array([i for i, tick in enumerate(self.ticks) if tick is not None], np.int64)
        passed = np.diff(np.array([tick for tick in self.ticks if tick is not None], np.int64)).astype(np.float64)
        between = np.diff(known)
        usable = (passed > 0) & (passed <= self.longest_step)
        if not usable.any():
            return None
        usual = np.median(np.repeat((passed / between)[usable], between[usable]))
        steps = np.full(len(self.ticks) - 1, usual)
        steps[known[0] : known[-1]] = np.repeat(np.where(usable, passed / between, usual), between)
        return steps
