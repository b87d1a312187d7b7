"""sslbench: self-supervised methods for Vision Transformers, compared fairly."""
