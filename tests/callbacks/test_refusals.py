"""What cannot work is refused before training, under the name of the callback that the user wrote."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toys import Classifier

from lightning_cl import AGEM, DER, EWC, KFACEWC, MAS, DERpp, KLToBase, LwF, Replay, RWalk, SelfReplay

METHODS = {
    AGEM: {},
    DER: {},
    DERpp: {},
    EWC: {},
    KFACEWC: {},
    KLToBase: {},
    LwF: {},
    MAS: {},
    RWalk: {},
    Replay: {"draw": "interfered"},
    SelfReplay: {},
}


class Sharding(SimpleNamespace):
    """As much of a Trainer as is looked at."""

    strategy, logger, log_dir, checkpoint_callbacks, fast_dev_run = FSDPStrategy(), None, None, [], False


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_sharded_parameters_are_refused_by_the_callback_that_was_given(kind):
    for named in (kind, type("Mine", (kind,), {})):
        method = named(**METHODS[kind])
        with pytest.raises(MisconfigurationException, match=rf"^{named.__name__}\b.*sharded by FSDPStrategy.*ddp"):
            method.setup(Sharding(callbacks=[method]), Classifier(), "validate")


@pytest.mark.parametrize("kind", [EWC, KFACEWC, MAS, LwF, KLToBase, DERpp, DER], ids=lambda kind: kind.__name__)
def test_several_loaders_are_refused_by_the_callback_that_was_given(kind):
    with pytest.raises(MisconfigurationException, match=rf"^{kind.__name__}: the training data of task 'a' is a dict"):
        kind().check_loader({"one": [], "two": []}, "a")
