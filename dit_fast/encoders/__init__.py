"""Autoencoders for images and text encoders."""
