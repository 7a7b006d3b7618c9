-- Runs that wait for the end of a usage limit, runs the API answered, and instances that show they are alive.

ALTER TABLE runs ADD COLUMN resume_at_us INTEGER; -- of a waiting run: when a usage limit of the provider ends
ALTER TABLE runs ADD COLUMN fallback TEXT;        -- JSON: the CLI's error, where the API answered in its place
ALTER TABLE instances ADD COLUMN alive_us INTEGER NOT NULL DEFAULT 0; -- the last sign of life
