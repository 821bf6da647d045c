#!lua flags=allow-oom
-- recorded: forget events that the database has, and bury those that it never can have.
-- ARGV[1] group  ARGV[2] dead letters at most  ARGV[3] their greatest age (ms)  ARGV[4] lists  then their names
-- then per entry: entry id, letters, then these (JSON): what of the entry could not be written
-- Returns: dead letters dropped, entries forgotten (others: another recorder was quicker).
-- Invariant: an entry goes only after the commit of whoever calls; a letter is written with its entry's end, once.
check_type(KEY.events, 'stream')
check_type(KEY.dead, 'stream')
local now_us, dropped, forgotten = clock_us(), 0, 0
local at = 5 + tonumber(ARGV[4])
local ids = {}
while at <= #ARGV do
  local id, letters = ARGV[at], tonumber(ARGV[at + 1])
  local was_pending = call('XACK', KEY.events, ARGV[1], id)
  forgotten = forgotten + was_pending
  ids[#ids + 1] = id
  for i = at + 2, at + 1 + letters do
    if was_pending == 1 then dropped = dropped + bury(ARGV[i], ARGV[2], tonumber(ARGV[3]), now_us) end
  end
  at = at + 2 + letters
end
if #ids > 0 then call('XDEL', KEY.events, unpack(ids)) end
for i = 5, 4 + tonumber(ARGV[4]) do call('UNLINK', ARGV[i]) end
return {dropped, forgotten}
