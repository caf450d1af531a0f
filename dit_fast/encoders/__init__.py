"""Autoencoders of images and encoders of text."""
