"""The list of adapter files, which two nodes have beside an input for an adapter of this graph."""

from comfy_api.latest import io

from .bridge.files import adapter_names, adapter_path

NO_FILE = "[from the lora input]"


def file_input() -> io.Input:
    return io.Combo.Input(
        "lora_name",
        options=[NO_FILE, *adapter_names()],
        default=NO_FILE,
        tooltip="A file in models/loras. Leave it at the first entry to use the lora input.",
    )


def stated(lora_name: str) -> str | None:
    """The file that an entry of the list names; None for the entry that names none."""
    return None if lora_name == NO_FILE else lora_name


def file_fingerprint(lora_name: str) -> object:
    """Another value when the file changes, so that it is read again."""
    if stated(lora_name) is None:
        return None
    status = adapter_path(lora_name).stat()
    return status.st_mtime_ns, status.st_size
