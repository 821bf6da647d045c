# One image for every part of Penstock; the first argument says which: gateway, stage NAME, mock-llm, ...
# Python and Debian are those that CI tests with.

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/penstock
# What pyproject.toml asks for comes first, so that a change of our own code does not install it again.
# `sentence-transformers` is another extra; it is large, and an embeddings server needs none.
ARG EXTRAS="qdrant amqp"
COPY pyproject.toml ./
RUN python -c "import sys, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *(line for extra in sys.argv[1:] for line in project['optional-dependencies'][extra]), \
    sep='\n')" $EXTRAS > requirements.txt \
    && /opt/penstock/bin/pip install --requirement requirements.txt
COPY LICENSE README.md penstock.py ./
COPY docs docs
COPY gateway gateway
COPY loadtest loadtest
COPY pipeline pipeline
COPY stages stages
RUN /opt/penstock/bin/pip install --no-deps . && /opt/penstock/bin/pip check

FROM python:3.11-slim-bookworm
RUN groupadd --gid 10001 penstock \
    && useradd --uid 10001 --gid penstock --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin penstock \
    && install --directory --owner penstock --group penstock /var/lib/penstock
COPY --from=build /opt/penstock /opt/penstock
ENV PATH=/opt/penstock/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# The only place of its own that a process may want to write to: the embedded index. Mount a volume here to keep it.
WORKDIR /var/lib/penstock
USER 10001:10001
# The gateway; the metrics of a stage; a mock replica.
EXPOSE 8000 9100 9000
ENTRYPOINT ["penstock"]
CMD ["--help"]
