"""The README's Lightning module, really trained."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastinterp as fi
from fastinterp.data import load_dataset

lightning = pytest.importorskip("lightning")


class Robust(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = fi.create_model("small", 1, 10)
        self.reg = fi.InterpretationRegularizer("cam", eps=0.05, steps=3, step_size=0.02)

    def training_step(self, batch, _):
        x, y = batch
        value, aux = self.reg(self.model, x, y, return_aux=True)
        self.log("discrepancy", value)
        return F.cross_entropy(aux.logits, y) + 0.01 * value

    def validation_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def test_a_lightning_module_learns(tmp_path):
    data = load_dataset("digits")
    train, validation = (
        DataLoader(TensorDataset(*split.batch(slice(None))), batch_size=50)
        for split in (data.train, data.validation)
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=5,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Robust(), train, validation)
    assert trainer.callback_metrics["accuracy"] > 0.7
    assert trainer.callback_metrics["discrepancy"] > 0
