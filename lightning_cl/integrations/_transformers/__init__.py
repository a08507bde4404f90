"""The parts of :mod:`lightning_cl.integrations.transformers`.

The name of this folder is private: else two classes named ``EWC`` would answer to ``--trainer.callbacks+=EWC``, and the
command line refuses a short name that has two.
"""
