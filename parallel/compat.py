"""Every private name of torch that Smalt uses, each with what it is for. A new torch is tried against this list."""

# The keys, in the metadata of a safetensors file, under which torch's HuggingFaceStorageReader finds where in the whole tensor
# a piece begins. The reader is public; the words of the format that it reads are not.
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY as PIECES_KEY
from torch.distributed.checkpoint._hf_utils import SAVED_OFFSETS_KEY as OFFSETS_KEY

__all__ = ["OFFSETS_KEY", "PIECES_KEY"]
