-- Feedback: what agronomists say a photo shows, beside what the model answered. Everything here may be run again.

CREATE TABLE IF NOT EXISTS feedback (
    request_id   text        NOT NULL,            -- the prediction, as in the inference log
    source       text        NOT NULL,            -- who says so: a person, a laboratory
    label        text        NOT NULL,            -- what the photo shows
    predicted    text        NOT NULL,            -- what the model answered
    version      text        NOT NULL,            -- the model that answered
    predicted_at timestamptz NOT NULL,
    received_at  timestamptz NOT NULL,            -- when the label reached us
    stored_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (request_id, source)              -- a label that is delivered twice is stored once
);

CREATE INDEX IF NOT EXISTS feedback_version_predicted_at ON feedback (version, predicted_at);
