//! The tables that measurements end in.

use anyhow::{Context, Result};
use std::{fs, path::Path};

/// A line of a table; what is written as JSON is `case`, `ours`, `against` and `ratio`.
#[derive(serde::Serialize)]
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) ours: f64,
    pub(crate) against: f64,
    pub(crate) ratio: f64,
    #[serde(skip)]
    pub(crate) unit: &'static str,
    #[serde(skip)]
    pub(crate) target: &'static str,
    #[serde(skip)]
    pub(crate) note: String,
}

/// Prints a table, and writes it where that is asked for.
pub(crate) fn show(rows: &[Row], json: Option<&Path>) -> Result<()> {
    let wide = rows.iter().map(|row| row.case.len()).max().unwrap_or(0);
    println!("\n{:<wide$} {:>9} {:>9} {:>7}  {:<9} {:<9} note", "case", "ours", "against", "ratio", "target", "unit");
    for Row { case, ours, against, ratio, unit, target, note } in rows {
        println!("{case:<wide$} {ours:>9.3} {against:>9.3} {ratio:>7.3}  {target:<9} {unit:<9} {note}");
    }
    if let Some(path) = json {
        fs::write(path, serde_json::to_vec_pretty(rows)?).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
