"""Which of the Triton kernels' configurations a device takes."""

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def architecture(device: torch.device) -> str:
    """The member of ``ARCHITECTURES`` whose configurations fit ``device``.

    Consumer parts of the Ampere and Ada generations have the tensor cores of sm_80 but the 99 KB of shared memory
    of sm_120, so they take the latter's. All AMD parts take gfx942's.
    """
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_120"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")
