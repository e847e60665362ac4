"""Numbers with the unit that fits them, three digits each, for people."""

from __future__ import annotations

from collections.abc import Sequence

_DURATIONS = ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"), (1e-3, "milliseconds"))
_OPERATIONS = ((1e18, "Eflop"), (1e15, "Pflop"), (1e12, "Tflop"), (1e9, "Gflop"), (1e6, "Mflop"), (1.0, "flop"))
_COUNTS = ((1e9, " G"), (1e6, " M"), (1e3, " K"), (1.0, ""))


def number(value: float) -> str:
    """Returns a number with three digits, and as a whole number from 1,000 on; e.g. 0.0123, 4.5, 120, 12,345."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def duration(seconds: float) -> tuple[str, str]:
    """Returns (number, unit) of a time; e.g. ("1.5", "hours")."""
    return _scaled(seconds, _DURATIONS)


def device_time(seconds: float) -> tuple[str, str]:
    """The same in hours, minutes or seconds: devices are paid by the hour."""
    return _scaled(seconds, _DURATIONS[1:-1])


def operations(count: float) -> str:
    """Returns a number of operations with its unit; e.g. "3.2 Gflop"."""
    return " ".join(_scaled(count, _OPERATIONS))


def parameters(count: float) -> str:
    """Returns a number of parameters with its prefix; e.g. "315.5 M", "704"."""
    size, name = next((unit for unit in _COUNTS if count >= unit[0]), _COUNTS[-1])
    return f"{count / size:.4g}{name}"


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> tuple[str, str]:
    """Takes the largest unit of which there is at least one."""
    size, name = next((unit for unit in units if value >= unit[0]), units[-1])
    return number(value / size), name
