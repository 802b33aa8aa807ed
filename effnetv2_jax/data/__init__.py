"""Data sets, augmentation and the input pipeline: the only package that runs TensorFlow.

Importing this package loads nothing; its modules load TensorFlow through `host_tf`.
"""
