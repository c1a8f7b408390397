# mambatrain on NVIDIA GPUs:
#   docker build -t mambatrain .
#   docker run --gpus all -v "$PWD":/home/trainer/work mambatrain pretrain demo --run runs/demo
# torch brings its own CUDA libraries; the image gives the driver's interface, and g++ compiles the kernels for CPUs.
# The Python commands below run in a test (tests/cli/test_dockerfile.py); the image as a whole has not been built where
# this was written.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml setup.py constraints.txt README.md LICENSE /src/
COPY mambatrain /src/mambatrain
COPY kernels /src/kernels
COPY recipes /src/recipes
RUN python3 -m venv /opt/mambatrain
RUN /opt/mambatrain/bin/pip install --no-cache-dir -c /src/constraints.txt "/src[eval]"

# Files that the container writes to a mounted folder belong to this user: `docker run --user "$(id -u)"` for another.
RUN useradd --create-home trainer && mkdir /home/trainer/work && chown trainer /home/trainer/work
USER trainer
ENV HOME=/home/trainer PATH=/opt/mambatrain/bin:$PATH
# The CUDA kernels for A100, H100 and H200, B200, RTX 50, so that no container compiles them at its start.
RUN mambatrain kernels build --arch 80,90,100,120
WORKDIR /home/trainer/work
ENTRYPOINT ["mambatrain"]
CMD ["--help"]
