-- The audit log: who changed what, by which plan, with which outcome. Rows are added and never changed.
-- Everything here may be run again.

CREATE TABLE IF NOT EXISTS audit_log (
    id        uuid        PRIMARY KEY,           -- made by the writer: a record delivered twice is stored once
    at        timestamptz NOT NULL,              -- when it happened, by the writer's clock
    stored_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor     text        NOT NULL,              -- user@host, or the flow
    action    text        NOT NULL,              -- a verb: publish, rollout, promote, ...
    subject   text        NOT NULL,              -- what it was done to: a version, a bucket, ...
    plan      jsonb       NOT NULL,              -- what was about to be done, secrets removed
    outcome   text        NOT NULL CHECK (outcome IN ('intended', 'done', 'failed', 'undone')),
    detail    text        NOT NULL,
    run_id    text                               -- the release or flow run
);

CREATE INDEX IF NOT EXISTS audit_log_at ON audit_log (at);
CREATE INDEX IF NOT EXISTS audit_log_run ON audit_log (run_id) WHERE run_id IS NOT NULL;

CREATE OR REPLACE FUNCTION audit_log_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'audit_log is append-only: % refused', TG_OP USING ERRCODE = 'insufficient_privilege';
END
$$;

CREATE OR REPLACE TRIGGER audit_log_no_change BEFORE UPDATE OR DELETE ON audit_log
    FOR EACH ROW EXECUTE FUNCTION audit_log_is_append_only();

CREATE OR REPLACE TRIGGER audit_log_no_truncate BEFORE TRUNCATE ON audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION audit_log_is_append_only();
