"""Torch's settings that memory and results hang on: carried to a process, or put back."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a script sets at its top, to be set again in another process.

    Attributes:
        threads: Of one operation on the CPU.
        dtype: Of tensors that are made without one.
        deterministic: Whether operations must be, and whether it is only warned of.
        cudnn: Enabled, benchmark, deterministic.
        device: The current GPU; None where CUDA has not been touched.
    """

    threads: int
    dtype: torch.dtype
    deterministic: tuple[bool, bool]
    cudnn: tuple[bool, bool, bool]
    device: int | None

    @classmethod
    def here(cls) -> "Settings":
        """Return this process's settings. Initialises nothing."""
        cudnn = torch.backends.cudnn
        return cls(
            threads=torch.get_num_threads(),
            dtype=torch.get_default_dtype(),
            deterministic=(
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            cudnn=(cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
            device=torch.cuda.current_device() if torch.cuda.is_initialized() else None,
        )

    def apply(self) -> None:
        """Make them this process's; nothing is touched where they are so already."""
        if type(self).here() == self:
            return
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        deterministic, warn_only = self.deterministic
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        cudnn = torch.backends.cudnn
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = self.cudnn
        if self.device is not None:
            torch.cuda.set_device(self.device)
