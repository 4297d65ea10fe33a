"""Devices and coordinator: training on data that never leaves its owner.

This package knows no torch, no Ray and no MLflow.
"""
