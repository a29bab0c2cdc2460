// An address that ends in #token=... logs in by itself. The part after # never reaches a server, and goes from the
// address bar at once.
const token = new URLSearchParams(location.hash.slice(1)).get("token");
if (token) {
  history.replaceState(null, "", location.pathname);
  const field = document.getElementById("token");
  field.value = token;
  field.form.submit();
}
