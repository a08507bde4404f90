"""Data that is no task, as samples like the tasks': what a model shall not forget."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.core.run_state import RunState
from lightning_cl.data.text.records import check_text_source, is_text_source
from lightning_cl.data.text.sources import describe_source, is_data

NAME = "general"
"""Of the task that this data stands in for, in messages."""


def check_general_data(data: Any, argument: str) -> None:
    """Checks that an argument can be data, without reading it.

    Raises:
        TypeError, ValueError, FileNotFoundError: naming the argument.
    """
    if is_text_source(data):
        check_text_source(data, NAME, argument)
    elif not is_data(data):
        raise TypeError(
            f"{argument}: expected a path, a name on the hub, texts, records, a datasets.Dataset or a torch Dataset,"
            f" got {describe_source(data)}"
        )


def general_samples(run: RunState, data: Any, owner: str, argument: str) -> Any:
    """The samples of general data: a torch data set, or a stream of token samples.

    Args:
        run: whose tokenizer and settings text is read with.
        data: whatever a task's data can be.
        owner: the method, for messages.
        argument: its argument.

    Raises:
        MisconfigurationException: if text is to be read and there is no tokenizer.
    """
    if not is_text_source(data):
        return data
    if run.data is None or not hasattr(run.data.tokenizer, "get_vocab"):
        raise MisconfigurationException(
            f"{owner}({argument}={describe_source(data)}): text needs a tokenizer: train with fit_tasks and a"
            " TaskDataModule(tokenizer=…), or give a torch Dataset of samples like the task's"
        )
    return run.data.samples_of(NAME, data)
