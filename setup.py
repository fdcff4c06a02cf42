"""Package metadata; everything else is in the Makefile and constraints.txt."""
from pathlib import Path

from setuptools import Extension, find_packages, setup

version = {}
exec(Path(__file__).with_name('pfcr_mm').joinpath('version.py').read_text(), version)

setup(
    name='pfcr_mm',
    version=version['__version__'],
    description='Low-bit post-training quantization (PFCR) of transformer detectors',
    long_description=Path(__file__).with_name('README.md').read_text(),
    long_description_content_type='text/markdown',
    python_requires='>=3.10',
    # plain C, loaded by ctypes; without a compiler PyTorch's own operations do its work
    ext_modules=[Extension(
        'pfcr_mm.quantizers._native', ['pfcr_mm/quantizers/native.c'], optional=True,
        extra_compile_args=['-O3', '-ffp-contract=off', '-fno-math-errno',
                            '-fno-trapping-math'])],
    packages=find_packages(include=['pfcr_mm', 'pfcr_mm.*']),
    package_data={
        'pfcr_mm': ['assets/*', 'analysis/templates/*', '.mim/*.yml', '.mim/configs/**/*.py',
                    '.mim/configs/**/*.yml'],
    },
    install_requires=[
        'Jinja2',
        'matplotlib',
        'torch>=2.6',
        'onedl-mmengine>=0.10.12',
        'onedl-mmcv>=2.3.6',
        'onedl-mmdetection>=3.5.1',
        'pycocotools',
        'safetensors',
        'timm>=1.0.31',
        'torchvision',
    ],
    extras_require={
        'dev': ['hypothesis', 'pytest', 'ruff'],
    },
)
