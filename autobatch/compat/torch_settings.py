"""torch's global settings on which memory and results depend: copied to a process, or restored."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchSettings:
    """The settings that a script makes at its top, so that another process can have them too.

    Attributes:
        threads: The number of threads of one operation on the CPU.
        dtype: The dtype of tensors that are made without one.
        deterministic: Whether operations must be deterministic, and whether torch only warns of
            operations that are not.
        cudnn: cuDNN's flags ``enabled``, ``benchmark`` and ``deterministic``.
        device: The index of the current GPU; None if this process has not used CUDA.

    Example:
        >>> settings = TorchSettings.here()
        >>> torch.set_default_dtype(torch.float64)
        >>> settings.apply()  # The default dtype is the former one again.
    """

    threads: int
    dtype: torch.dtype
    deterministic: tuple[bool, bool]
    cudnn: tuple[bool, bool, bool]
    device: int | None

    @classmethod
    def here(cls) -> "TorchSettings":
        """Return this process's settings, without initializing CUDA."""
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
        """Make these settings this process's, if they are not already."""
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
