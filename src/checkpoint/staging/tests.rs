use super::*;

fn destination(path: &Path, overwrite: bool) -> Destination {
    Destination { path: resolve(path).unwrap(), overwrite }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_commit_leaves_only_the_destination() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("new/parents/out");
    let stage = StagingDirectory::begin(destination(&out, false)).unwrap();
    stage.write("a.txt", b"1").unwrap();
    assert!(!out.exists());
    stage.commit().unwrap();
    assert_eq!(fs::read(out.join("a.txt")).unwrap(), b"1");
    assert_eq!(names(&root.path().join("new/parents")), ["out"]);
}

#[test]
fn a_dropped_stage_leaves_no_trace() {
    let root = tempfile::tempdir().unwrap();
    let stage = StagingDirectory::begin(destination(&root.path().join("new/parents/out"), false)).unwrap();
    stage.write("a.txt", b"1").unwrap();
    drop(stage);
    assert!(names(root.path()).is_empty());
}

#[test]
fn overwriting_replaces_the_whole_directory_either_way() {
    type Exchange = fn(&Path, &Path) -> std::io::Result<()>;
    for exchange in [exchange as Exchange, exchange_in_steps as Exchange] {
        let root = tempfile::tempdir().unwrap();
        let (old, new) = (root.path().join("old"), root.path().join("new"));
        for (path, file) in [(&old, "was"), (&new, "is")] {
            fs::create_dir(path).unwrap();
            fs::write(path.join(file), b"").unwrap();
        }
        exchange(&new, &old).unwrap();
        assert_eq!((names(&old), names(&new)), (vec!["is".to_owned()], vec!["was".to_owned()]));
        assert_eq!(names(root.path()), ["new", "old"]);
    }
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    for (file, overwrite) in [("config.json", false), ("vocab.txt", true)] {
        let stage = StagingDirectory::begin(destination(&out, overwrite)).unwrap();
        stage.write(file, b"").unwrap();
        stage.commit().unwrap();
    }
    assert_eq!((names(root.path()), names(&out)), (vec!["out".to_owned()], vec!["vocab.txt".to_owned()]));
}

#[test]
fn what_came_into_a_checkpoint_while_the_run_went_on_is_not_overwritten() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("config.json"), b"{}").unwrap();
    let stage = StagingDirectory::begin(destination(&out, true)).unwrap();
    fs::write(out.join("thesis.tex"), b"").unwrap();
    let error = stage.commit().unwrap_err();
    assert!(matches!(error, Error::Destination { .. }) && error.to_string().contains("'thesis.tex'"), "{error}");
    assert_eq!(
        (names(root.path()), names(&out)),
        (vec!["out".to_owned()], vec!["config.json".into(), "thesis.tex".into()])
    );
}

#[test]
fn a_destination_filled_meanwhile_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let stage = StagingDirectory::begin(destination(&out, false)).unwrap();
    fs::create_dir(&out).unwrap();
    fs::write(out.join("theirs"), b"").unwrap();
    assert!(matches!(stage.commit(), Err(Error::Destination { .. })));
    assert_eq!((names(root.path()), names(&out)), (vec!["out".to_owned()], vec!["theirs".to_owned()]));
}

#[test]
fn live_runs_are_left_alone_and_stale_ones_cleaned() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let live = StagingDirectory::begin(destination(&out, false)).unwrap();
    live.write("half", b"").unwrap();
    let second = StagingDirectory::begin(destination(&out, false)).unwrap_err();
    assert!(second.to_string().contains("another run"), "{second}");
    assert!(live.directory().join("half").exists());
    drop(live);

    // What a killed run leaves: an unlocked lock and a half-filled directory.
    fs::write(sibling(&out, "lock"), b"").unwrap();
    fs::create_dir(sibling(&out, "partial")).unwrap();
    fs::write(sibling(&out, "partial").join("stale"), b"").unwrap();
    let stage = StagingDirectory::begin(destination(&out, false)).unwrap();
    assert!(names(stage.directory()).is_empty());
    stage.commit().unwrap();
    assert_eq!(names(root.path()), ["out"]);
}

#[test]
fn what_a_killed_exchange_moved_aside_comes_back() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let aside = sibling(&out, "replaced");
    fs::create_dir(&aside).unwrap();
    fs::write(aside.join("theirs"), b"").unwrap();
    assert!(matches!(StagingDirectory::begin(destination(&out, false)), Err(Error::Destination { .. })));
    assert_eq!((names(root.path()), names(&out)), (vec!["out".to_owned()], vec!["theirs".to_owned()]));
}

// Elsewhere, links need rights that a user may not have.
#[cfg(unix)]
#[test]
fn paths_are_resolved_through_links_and_missing_ends() {
    let root = tempfile::tempdir().unwrap();
    let real = root.path().canonicalize().unwrap();
    fs::create_dir(real.join("a")).unwrap();
    std::os::unix::fs::symlink("a", real.join("link")).unwrap();
    assert_eq!(resolve(&real.join("link/b/c")).unwrap(), real.join("a/b/c"));
    assert_eq!(resolve(&real.join("a/../a/b")).unwrap(), real.join("a/b"));
    assert!(resolve(&real.join("missing/../b")).is_err());
    std::os::unix::fs::symlink("nowhere", real.join("dangling")).unwrap();
    assert!(resolve(&real.join("dangling")).is_err());
}
