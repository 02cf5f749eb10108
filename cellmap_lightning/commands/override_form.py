"""Settings in messages: in the form of Python, and in that of the overrides of a command."""

import re

#: Values of Python and of the command line.
_VALUES = {"True": "true", "False": "false", "None": "null"}
#: Settings of the data module in messages; ``split`` is a setting of cellmap-preview too, with other values.
_OF_DATA = re.compile(
    r"(?<![\w.])(?:(?:too_coarse|unannotated_classes|leakage|missing_raw|max_upsampling)=(?=\w)"
    r"|split=(?=random|stratified|by_dataset|leave_one_dataset_out|kfold|blocks))"
)
#: Settings of the writer in messages of ``cellmap-predict``, with the quotes of a value.
_OF_WRITER = re.compile(r"(?<![\w.])(key|activation|dtype|check_context)=(?:'([^'\s]*)'|(?=\w))")
#: Commands whose key for the normalization is not ``data.normalize``.
_NORMALIZE = {"predict": "metadata.normalize"}


def as_overrides(text: str, command: str = "train") -> str:
    """Return a message with arguments of Python, such as ``overwrite=True``, as overrides of a command.

    Settings of the data module, such as ``leakage=warn``, get their prefix ``data.``, and those of the writer, such as
    ``key='labels'``, in ``cellmap-predict`` their prefix ``writer.``.

    Args:
        text: the message.
        command: the command, such as ``train``, whose keys are named.

    Example:
        >>> as_overrides('set normalize={"range": [0, 255]}, or overwrite=True')
        "set 'data.normalize={range: [0,255]}', or overwrite=true"
    """
    text = re.sub(r"\b(\w+)=(True|False|None)\b", lambda match: f"{match[1]}={_VALUES[match[2]]}", text)
    text = _OF_DATA.sub(r"data.\g<0>", text)
    if command == "predict":
        text = _OF_WRITER.sub(lambda match: f"writer.{match[1]}={match[2] or ''}", text)
    text = re.sub(
        r"; give classes=\[('[^]]*')\]",
        lambda match: f"; give data.classes=[{match[1].replace(chr(39), '').replace(', ', ',')}]",
        text,
    )
    key = _NORMALIZE.get(command, "data.normalize")

    def quoted(match: re.Match[str]) -> str:
        return f"'{key}={{{match[1]}: [{match[2].replace(', ', ',')}]}}'"

    return re.sub(r'(?<![\w.])normalize=\{"(\w+)": \[([^]]*)\]\}', quoted, text)
