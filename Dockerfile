# Builds rekindle and the default model into one image: Debian, the program, a model, and no Python.

FROM rust:1.95-slim-bookworm AS build
# The default model comes through pip.
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked && cp target/release/rekindle /usr/local/bin/rekindle
RUN rekindle pull --models-dir /models

FROM debian:bookworm-slim
# curl for the health check, certificates for `rekindle pull`.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates curl && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --home-dir /srv/rekindle --create-home rekindle
WORKDIR /srv/rekindle
COPY --from=build /usr/local/bin/rekindle /usr/local/bin/rekindle
# A volume that is empty at its first use takes over these folders, with their owner.
COPY --from=build --chown=rekindle /models models
RUN install -d -m 0700 -o rekindle data
USER rekindle
VOLUME ["/srv/rekindle/data", "/srv/rekindle/models"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["rekindle"]
CMD ["serve"]
