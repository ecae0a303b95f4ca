//! The tasks on the disk: one SQLite table.
//!
//! | column | meaning |
//! |---|---|
//! | `id` | names the row for one try; never used again |
//! | `kind`, `key` | together unique |
//! | `payload` | as it was added last |
//! | `version` | grows with every renewal: a try that began before one does not settle the task |
//! | `due_ms`, `added_ms` | milliseconds since 1970 |
//! | `failures`, `last_error` | of the tries so far |
//! | `given_up` | 1: not tried any more |
//!
//! What runs is not in the table. `user_version` is the schema's version; a later one is refused.

use super::{Added, Counts, DELAY_MAX, Error, Kept, State, Task};
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, named_params, params};
use std::{collections::BTreeMap, fs::File, path::Path, time::Duration};

/// The version of the table below.
const SCHEMA: i64 = 1;
/// How long a person with the `sqlite3` tool may hold the database before a commit fails.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Statements kept prepared.
const STATEMENTS_MAX: usize = 16;

const CREATE: &str = "
    CREATE TABLE task (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        key TEXT NOT NULL,
        payload BLOB NOT NULL,
        version INTEGER NOT NULL DEFAULT 1,
        due_ms INTEGER NOT NULL,
        added_ms INTEGER NOT NULL,
        failures INTEGER NOT NULL DEFAULT 0,
        last_error TEXT,
        given_up INTEGER NOT NULL DEFAULT 0,
        UNIQUE (kind, key)
    ) STRICT;
    CREATE INDEX task_by_time ON task (kind, due_ms) WHERE given_up = 0;
    PRAGMA user_version = 1;
";

#[derive(Debug)]
pub(super) struct Table {
    connection: Connection,
}

/// A task to add.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) kind: String,
    pub(super) key: String,
    pub(super) payload: Bytes,
    pub(super) due_ms: u64,
}

/// A task that may be due.
#[derive(Debug)]
pub(super) struct Due {
    pub(super) id: i64,
    pub(super) version: i64,
    pub(super) due_ms: u64,
    pub(super) task: Task,
}

/// What a try changes.
#[derive(Debug)]
pub(super) enum Change<'a> {
    Done,
    Failed { error: &'a str, due_ms: u64 },
    GivenUp { error: &'a str },
}

/// SQLite's integers are signed; our times fit for 292 million years.
fn signed(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

fn unsigned(row: &rusqlite::Row<'_>, column: usize) -> Result<u64, rusqlite::Error> {
    let value: i64 = row.get(column)?;
    u64::try_from(value).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, value))
}

fn rows(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

impl Table {
    pub(super) fn open(path: &Path, now_ms: u64) -> Result<Self, Error> {
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
        connection.pragma_update(None, "journal_mode", "wal")?;
        // NORMAL would lose acknowledged commits with the power.
        connection.pragma_update(None, "synchronous", "full")?;
        let schema: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        match schema {
            0 => {
                let transaction = connection.transaction()?;
                transaction.execute_batch(CREATE)?;
                transaction.commit()?;
            }
            SCHEMA => {}
            later => return Err(Error::Schema(later)),
        }
        // The name of a new file is the directory's to keep.
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            File::open(dir)?.sync_all()?;
        }
        // No delay is that long: the clock was set back.
        let latest = signed(now_ms.saturating_add(u64::try_from(DELAY_MAX.as_millis()).unwrap_or(u64::MAX)));
        connection.execute("UPDATE task SET due_ms = ?1 WHERE due_ms > ?2", params![signed(now_ms), latest])?;
        Ok(Self { connection })
    }

    pub(super) fn counts(&self) -> Result<BTreeMap<String, Counts>, Error> {
        let mut statement =
            self.connection.prepare("SELECT kind, given_up, count(*) FROM task GROUP BY kind, given_up")?;
        let mut counts: BTreeMap<String, Counts> = BTreeMap::new();
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let counts = counts.entry(row.get(0)?).or_default();
            let number = unsigned(row, 2)?;
            if row.get(1)? { counts.given_up = number } else { counts.waiting = number }
        }
        Ok(counts)
    }

    pub(super) fn begin(&mut self) -> Result<Writing<'_>, rusqlite::Error> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        Ok(Writing { transaction })
    }

    /// The earliest tasks of a kind.
    pub(super) fn due(&self, kind: &str, limit: usize) -> Result<Vec<Due>, rusqlite::Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT id, version, due_ms, key, payload, failures FROM task WHERE kind = ?1 AND given_up = 0 ORDER BY due_ms LIMIT ?2",
        )?;
        let due = statement.query_map(params![kind, rows(limit)], |row| {
            let payload: Vec<u8> = row.get(4)?;
            let task = Task { key: row.get(3)?, payload: payload.into(), failures: row.get(5)? };
            Ok(Due { id: row.get(0)?, version: row.get(1)?, due_ms: unsigned(row, 2)?, task })
        })?;
        due.collect()
    }

    pub(super) fn find(
        &self,
        kind: &str,
        key: &str,
        is_running: impl Fn(i64) -> bool,
    ) -> Result<Option<Kept>, rusqlite::Error> {
        let sql = "SELECT id, kind, key, failures, last_error, added_ms, due_ms, given_up FROM task WHERE kind = ?1 AND key = ?2";
        self.connection.prepare_cached(sql)?.query_row(params![kind, key], |row| kept(row, &is_running)).optional()
    }

    pub(super) fn page(
        &self,
        kind: &str,
        after: Option<&str>,
        limit: usize,
        is_running: impl Fn(i64) -> bool,
    ) -> Result<Vec<Kept>, rusqlite::Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT id, kind, key, failures, last_error, added_ms, due_ms, given_up FROM task
             WHERE kind = ?1 AND key > ?2 ORDER BY key LIMIT ?3",
        )?;
        statement.query_map(params![kind, after.unwrap_or(""), rows(limit)], |row| kept(row, &is_running))?.collect()
    }

    /// Folds the log into the database and closes it.
    pub(super) fn close(self) {
        if let Err((_, error)) = self.connection.close() {
            tracing::warn!(%error, "close the retry queue's database");
        }
    }
}

fn kept(row: &rusqlite::Row<'_>, is_running: &impl Fn(i64) -> bool) -> Result<Kept, rusqlite::Error> {
    let state = match (row.get(7)?, is_running(row.get(0)?)) {
        (true, _) => State::GivenUp,
        (false, true) => State::Running,
        (false, false) => State::Waiting,
    };
    Ok(Kept {
        kind: row.get(1)?,
        key: row.get(2)?,
        state,
        failures: row.get(3)?,
        last_error: row.get(4)?,
        added_ms: unsigned(row, 5)?,
        due_ms: unsigned(row, 6)?,
    })
}

/// A transaction; rolled back unless committed.
pub(super) struct Writing<'a> {
    transaction: Transaction<'a>,
}

impl Writing<'_> {
    /// Adds or renews a task. None: it would be a new one and there is no room. The flag says that it had been given up.
    pub(super) fn add(
        &self,
        row: &Row,
        now_ms: u64,
        room: bool,
        is_running: impl Fn(i64) -> bool,
    ) -> Result<Option<(Added, bool)>, rusqlite::Error> {
        let known = "SELECT id, payload = ?3, given_up FROM task WHERE kind = ?1 AND key = ?2";
        let known: Option<(i64, bool, bool)> = self
            .transaction
            .prepare_cached(known)?
            .query_row(params![row.kind, row.key, &row.payload[..]], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
            .optional()?;
        match known {
            None if !room => Ok(None),
            None => {
                let insert = "INSERT INTO task (kind, key, payload, due_ms, added_ms) VALUES (?1, ?2, ?3, ?4, ?5)";
                let values = params![row.kind, row.key, &row.payload[..], signed(row.due_ms), signed(now_ms)];
                self.transaction.prepare_cached(insert)?.execute(values)?;
                Ok(Some((Added::New, false)))
            }
            Some((id, true, false)) if !is_running(id) => Ok(Some((Added::Known, false))),
            Some((id, _, given_up)) => {
                let renew =
                    "UPDATE task SET payload = ?2, due_ms = ?3, version = version + 1, given_up = 0 WHERE id = ?1";
                self.transaction.prepare_cached(renew)?.execute(params![id, &row.payload[..], signed(row.due_ms)])?;
                Ok(Some((Added::Renewed, given_up)))
            }
        }
    }

    /// Records a try's end. False: the task was renewed meanwhile, and goes on as renewed.
    pub(super) fn change(&self, id: i64, version: i64, change: &Change<'_>) -> Result<bool, rusqlite::Error> {
        let changed = match change {
            Change::Done => {
                let sql = "DELETE FROM task WHERE id = ?1 AND version = ?2";
                self.transaction.prepare_cached(sql)?.execute(params![id, version])?
            }
            Change::Failed { error, due_ms } => {
                let sql = "UPDATE task SET due_ms = :due, failures = failures + 1, last_error = :error
                           WHERE id = :id AND version = :version";
                let values = named_params! { ":id": id, ":version": version, ":due": signed(*due_ms), ":error": error };
                self.transaction.prepare_cached(sql)?.execute(values)?
            }
            Change::GivenUp { error } => {
                let sql = "UPDATE task SET given_up = 1, failures = failures + 1, last_error = ?3
                           WHERE id = ?1 AND version = ?2";
                self.transaction.prepare_cached(sql)?.execute(params![id, version, error])?
            }
        };
        Ok(changed > 0)
    }

    pub(super) fn commit(self) -> Result<(), rusqlite::Error> {
        self.transaction.commit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_are_synced() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(&dir.path().join("retry.db"), 0).unwrap();
        let pragma =
            |name| table.connection.pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0));
        assert_eq!(pragma("journal_mode").unwrap(), rusqlite::types::Value::Text("wal".into()));
        assert_eq!(pragma("synchronous").unwrap(), rusqlite::types::Value::Integer(2), "FULL");
    }

    #[test]
    fn a_later_schema_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("retry.db");
        drop(Table::open(&path, 0).unwrap());
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 7).unwrap();
        assert!(matches!(Table::open(&path, 0), Err(Error::Schema(7))));
    }

    #[test]
    fn a_clock_set_back_does_not_strand_tasks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("retry.db");
        let year = 365 * 24 * 3_600_000;
        let mut table = Table::open(&path, year).unwrap();
        let writing = table.begin().unwrap();
        let row = Row { kind: "k".into(), key: "a".into(), payload: Bytes::new(), due_ms: year };
        writing.add(&row, year, true, |_| false).unwrap();
        writing.commit().unwrap();
        drop(table);
        let table = Table::open(&path, 5).unwrap();
        assert_eq!(table.due("k", 1).unwrap()[0].due_ms, 5);
    }

    #[test]
    fn the_earliest_tasks_come_by_the_index() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(&dir.path().join("retry.db"), 0).unwrap();
        let plan = "EXPLAIN QUERY PLAN SELECT id FROM task WHERE kind = 'k' AND given_up = 0 ORDER BY due_ms LIMIT 5";
        let plan: String = table.connection.query_row(plan, [], |row| row.get(3)).unwrap();
        assert!(plan.contains("task_by_time"), "{plan}");
    }
}
