"""The modules that a compressed or customized model holds, and how they get in and out."""
