"""Networks of the codec: autoencoder, hyper-encoder, quantizer, flow transformer, text encoder."""
