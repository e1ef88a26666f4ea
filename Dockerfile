# nemo-mapo in the last NeMo container that carries NeMo-Aligner. docs/container.md explains it.
#   docker build -t nemo-mapo .
ARG BASE=nvcr.io/nvidia/nemo:25.02
FROM ${BASE}

# What nemo-mapo needs and the image has in range stays as it is; pip adds what is missing.
COPY pyproject.toml README.md LICENSE NOTICE /opt/nemo-mapo/
COPY nemo_mapo /opt/nemo-mapo/nemo_mapo
WORKDIR /opt/nemo-mapo
RUN python -m pip install --no-cache-dir --no-deps -e . \
    && python -m nemo_mapo.doctor --write-pip-files /opt/pip-files \
    && cat /opt/pip-files/requirements.txt \
    && python -m pip install --no-cache-dir -r /opt/pip-files/requirements.txt -c /opt/pip-files/constraints.txt

# The tagger of the part-of-speech gate; without it a tagger that needs no data takes its place.
ENV NLTK_DATA=/opt/nltk_data
RUN python -m nltk.downloader -d /opt/nltk_data averaged_perceptron_tagger_eng

COPY conf /opt/nemo-mapo/conf
COPY examples /opt/nemo-mapo/examples
COPY data /opt/nemo-mapo/data

# torch, Transformer Engine, apex and TensorRT-LLM are those of the image, or there is no image.
RUN python -m nemo_mapo.doctor --writable /tmp --unchanged /opt/pip-files/constraints.txt
