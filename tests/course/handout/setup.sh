#!/usr/bin/env bash
# Gradescope runs this once, to build the image.
cd /autograder/source || exit 1
python3 -m pip install --extra-index-url https://download.pytorch.org/whl/cpu -r requirements-dev.txt
