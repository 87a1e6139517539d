"""The codec's networks: autoencoder, hyper-encoder, quantizer, flow transformer, text encoder."""
