# An image for docs/pods.md: docker build --build-arg EXTRA=cuda13 -t IMAGE . (EXTRA: cuda, cuda13 or tpu).
FROM python:3.12-slim
ARG EXTRA=cuda
WORKDIR /ngc_jax
COPY . .
RUN pip install --no-cache-dir ".[${EXTRA},gcs]"
WORKDIR /runs
ENTRYPOINT ["ngc"]
CMD ["--help"]
