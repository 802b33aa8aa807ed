"""Pretrained weights in and out: one file per layout, and a folder format of our own."""
