"""Marks of tests that need what not every machine has."""
import importlib.util
import os
import shutil

import pytest
import torch

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get('CXX', 'g++')) is None, reason='torch.compile needs a C++ compiler')
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None,
                                  reason='needs Triton, which comes with torch for GPUs')
