"""A model that is quick to fit, and its fit."""

import pytest

from anomalib_vtfusion import VTFusion


@pytest.fixture(scope="session")
def make_model(cnn_encoder):
    """Function that makes a model of a few steps; keyword arguments go to VTFusion."""

    def make(**arguments):
        defaults = {"encoder": cnn_encoder, "k_shot": 2, "num_steps": 3, "bank_size": 256}
        return VTFusion(**(defaults | arguments))

    return make


@pytest.fixture(scope="session")
def fitted():
    """Function that fits a model and returns it."""

    def fit(model, engine, datamodule):
        engine.fit(model, datamodule=datamodule)
        return model

    return fit
