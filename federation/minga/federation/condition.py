"""What a device's machine is doing, and what a campaign asks of machines.

Only what concerns the machine is told to the coordinator. How many examples a device has is judged
on the device: the requirement travels to it, the number does not travel back.
"""

from dataclasses import dataclass

from minga.federation.limits import IDLE_CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A device's machine at one moment."""

    on_mains: bool
    """It does not run on a battery."""
    idle_cpu: float
    """Share of the processors' time that nothing used lately, 0 to 1."""
    free_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a device must be like to be invited."""

    charging: bool = False
    idle: bool = False
    min_free_memory_bytes: int = 0
    min_examples: int = 0
    """Judged by the device itself."""

    @property
    def concern_machines(self) -> bool:
        """True if a coordinator has something to judge."""
        return self.charging or self.idle or self.min_free_memory_bytes > 0

    def are_met_by(self, condition: Condition | None) -> bool:
        """Tell whether a device in this condition may be invited; one that says nothing may not."""
        if not self.concern_machines:
            return True
        return (
            condition is not None
            and (condition.on_mains or not self.charging)
            and (condition.idle_cpu >= IDLE_CPU or not self.idle)
            and condition.free_memory_bytes >= self.min_free_memory_bytes
        )
