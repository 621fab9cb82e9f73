"""Until `Decoder.layer` gives its layer no parent."""

from qwen_jax.models.decoder import Decoder, _compiled_layer


def layer(self, i):
    config = self.config
    is_sparse = config.moe is not None and i in config.moe.layers
    return _compiled_layer(config, self.mesh)(
        config, config.layer_types[i], is_sparse, self.dispatch, self.capacity_factor, parent=None
    )


Decoder.layer = layer
