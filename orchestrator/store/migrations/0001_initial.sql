-- Times are microseconds since 1970 UTC. NULL money is unknown money, never zero.

CREATE TABLE instances (
    id          TEXT PRIMARY KEY,
    kind        TEXT NOT NULL,              -- serve | run | library
    host        TEXT NOT NULL,
    pid         INTEGER NOT NULL,
    pid_created REAL NOT NULL,              -- the process's own start time: a pid alone is used again
    started_us  INTEGER NOT NULL,
    ended_us    INTEGER
);

CREATE TABLE runs (
    id               TEXT PRIMARY KEY,      -- 16 hex digits; also the OTel span id of the run
    trace_id         TEXT NOT NULL,         -- 32 hex digits
    parent_id        TEXT REFERENCES runs (id),
    parent_span_id   TEXT,                  -- the exact caller (a tool call's span), else the parent run
    root_id          TEXT NOT NULL,
    depth            INTEGER NOT NULL,      -- 0 for a plan, 1 for a run nobody delegated
    kind             TEXT NOT NULL,         -- agent | plan
    name             TEXT NOT NULL,         -- agent or plan name
    step             TEXT,                  -- job id inside a plan: "review[2]"
    status           TEXT NOT NULL,
    prompt           TEXT,
    text             TEXT NOT NULL DEFAULT '',   -- the answer, or what had been said when the run ended
    structured       TEXT,                  -- JSON
    has_structured   INTEGER NOT NULL DEFAULT 0, -- null may be an answer
    error            TEXT,                  -- JSON of the error's facts
    agent            TEXT,                  -- JSON of the agent file as it was when the run began
    options          TEXT NOT NULL DEFAULT '{}', -- JSON of the task's overrides; for a plan its inputs
    source           TEXT,                  -- the plan's text
    model_requested  TEXT,
    model_used       TEXT,
    project          TEXT NOT NULL,         -- the project directory whose agents and paths are meant
    cwd              TEXT NOT NULL,
    session_id       TEXT,
    session_mode     TEXT,
    source_session_id TEXT,
    caller           TEXT,                  -- JSON: who asked (client, its session, its project)
    input_tokens     INTEGER NOT NULL DEFAULT 0,
    output_tokens    INTEGER NOT NULL DEFAULT 0,
    cache_read_tokens INTEGER NOT NULL DEFAULT 0,
    cache_write_tokens INTEGER NOT NULL DEFAULT 0,
    cost_usd         REAL,
    cost_basis       TEXT,                  -- cli: the CLI's own figure; estimate: list prices of what streamed
    num_turns        INTEGER NOT NULL DEFAULT 0,
    budget_usd       REAL,
    created_us       INTEGER NOT NULL,
    started_us       INTEGER,
    ended_us         INTEGER,
    cancel_requested INTEGER NOT NULL DEFAULT 0, -- asked for by another process; the owner acts on it
    instance_id      TEXT NOT NULL
);
CREATE INDEX runs_by_parent ON runs (parent_id);
CREATE INDEX runs_by_root ON runs (root_id);
CREATE INDEX runs_by_time ON runs (created_us);
CREATE INDEX runs_by_agent ON runs (name, created_us);
CREATE INDEX runs_by_session ON runs (session_id);
CREATE INDEX runs_unfinished ON runs (instance_id) WHERE ended_us IS NULL;

CREATE TABLE messages (
    run_id  TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    seq     INTEGER NOT NULL,
    at_us   INTEGER NOT NULL,
    type    TEXT NOT NULL,
    subtype TEXT,
    body    TEXT NOT NULL,                  -- JSON as the backend printed it
    PRIMARY KEY (run_id, seq)
) WITHOUT ROWID;

CREATE TABLE sessions (
    id          TEXT PRIMARY KEY,           -- the backend's own session id
    backend     TEXT NOT NULL,
    agent       TEXT NOT NULL,
    cwd         TEXT NOT NULL,
    home        TEXT NOT NULL,              -- a session can only be continued under the HOME that keeps it
    parent_id   TEXT,                       -- the session this one was forked from
    turns       INTEGER NOT NULL DEFAULT 0,
    last_run_id TEXT,
    locked_by   TEXT,                       -- the run that holds it now
    created_us  INTEGER NOT NULL,
    updated_us  INTEGER NOT NULL
);

CREATE TABLE agent_preferences (
    agent      TEXT PRIMARY KEY,
    model      TEXT NOT NULL,
    updated_us INTEGER NOT NULL
);
