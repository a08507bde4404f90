"""Which positions of a batch bear loss: what the Fisher of a sequence is made of."""

from __future__ import annotations

import lightning as L
import torch
from toys import trainer
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from lightning_cl import EWC
from lightning_cl.passes.logits import loss_positions

IDS = torch.arange(12).reshape(2, 6)


def test_labels_say_where_there_is_loss_and_the_first_token_has_none():
    labels = torch.tensor([[0, 1, 2, -100, 4, 5], [-100, -100, -100, 9, 10, 11]])
    expected = torch.tensor([[True, True, False, True, True], [False, False, True, True, True]])
    assert torch.equal(loss_positions({"input_ids": IDS, "labels": labels}), expected)


def test_a_loss_mask_comes_before_the_attention_mask():
    mask = torch.tensor([[0, 0, 0, 0, 1, 1]] * 2)
    positions = loss_positions({"input_ids": IDS, "loss_mask": mask, "attention_mask": torch.ones_like(IDS)})
    assert positions.sum(1).tolist() == [2, 2]


def test_padding_bears_no_loss():
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert loss_positions({"input_ids": IDS, "attention_mask": mask}).sum(1).tolist() == [3, 5]


def test_a_sequence_classifier_has_one_label_and_no_positions():
    for key in ("label", "labels"):
        assert loss_positions({"input_ids": IDS, key: torch.tensor([0, 1])}) is None


def test_a_batch_that_is_no_mapping_has_no_positions():
    assert loss_positions([IDS, IDS]) is None


CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=8,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    num_labels=3,
)


class Wraps(L.LightningModule):
    """Any transformers model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Samples(torch.utils.data.Dataset):
    """One sequence, and its labels."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"input_ids": IDS[index], "labels": self.labels[index]}


def exact_fisher(tmp_path, module, labels):
    ewc = EWC(estimator="exact", normalize=False)
    trainer(tmp_path, [ewc], max_epochs=1).fit(module, torch.utils.data.DataLoader(Samples(labels)))
    return ewc.importance


def test_a_masked_language_model_is_not_shifted(tmp_path):
    """Only position 2 bears loss, and it predicts its own label: the Fisher is that of the softmax there."""
    torch.manual_seed(0)
    module = Wraps(BertForMaskedLM(CONFIG))
    labels = torch.full((2, 6), -100)
    labels[:, 2] = 7
    fisher = exact_fisher(tmp_path, module, labels)["model.cls.predictions.bias"]
    module.eval()
    with torch.no_grad():
        p = module.model(input_ids=IDS).logits[:, 2].softmax(-1)
    # d log p_y / d bias_c = [y = c] − p_c, whose square has the expectation p_c (1 − p_c).
    torch.testing.assert_close(fisher, (p * (1 - p)).mean(0), rtol=1e-4, atol=1e-7)


def test_a_sequence_classifier_has_the_fisher_of_its_classes(tmp_path):
    torch.manual_seed(0)
    module = Wraps(BertForSequenceClassification(CONFIG))
    fisher = exact_fisher(tmp_path, module, torch.tensor([0, 2]))["model.classifier.bias"]
    module.eval()
    with torch.no_grad():
        p = module.model(input_ids=IDS).logits.softmax(-1)
    torch.testing.assert_close(fisher, (p * (1 - p)).mean(0), rtol=1e-4, atol=1e-7)
